"""What a record in a file means: formats, and the parts they share."""

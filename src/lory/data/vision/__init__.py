"""Images, opened and fitted without trusting them."""

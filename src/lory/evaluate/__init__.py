"""`lory eval`: how well a model predicts given texts, and how close and how varied its own answers are."""

"""Conversations to tokens, once: templates, the encoder, its processes, and the store of what came out."""

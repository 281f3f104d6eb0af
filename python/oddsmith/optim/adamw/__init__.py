"""AdamW with moments of 8 bits, and its paged forms."""

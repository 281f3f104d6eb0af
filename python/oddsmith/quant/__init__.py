"""NF4 weights: codes, their state, the product with them, and modules that hold them."""

"""`oddsmith demo`: pairs with checkable answers, a tokenizer and a model made on the spot, ORPO."""

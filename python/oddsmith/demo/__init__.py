"""`oddsmith demo`: generates checkable pairs, a tokenizer and a model, and trains with ORPO."""

"""Every change to another library: transformers, peft, accelerate, bitsandbytes, torch."""

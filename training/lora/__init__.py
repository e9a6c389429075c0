"""Adapters (LoRA, DoRA, LoHa, LoKr) on a frozen base: made by PEFT, kept in states alone, written for other programs."""

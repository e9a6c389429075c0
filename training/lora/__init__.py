"""Adapters (LoRA, DoRA, LoHa, LoKr) on a frozen base: made by PEFT, alone in states, written for other programs."""

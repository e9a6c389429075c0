"""The data format, and the stages that produce it. Never imports torch."""

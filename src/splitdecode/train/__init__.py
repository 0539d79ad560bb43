"""F7: teaching the small model when to hand over (docs/training.md)."""

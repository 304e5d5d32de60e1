"""What leaves the run: packing, the Hugging Face checkpoint, verification, the hand-off."""

"""Self-supervised backbones for dense prediction: pre-train, publish, find, fine-tune."""

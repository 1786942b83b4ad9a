"""Fine-tuning a backbone inside a detector or segmenter of transformers, by its `Trainer`, on the folders that `finetune` reads."""

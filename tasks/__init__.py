"""What the checkpoints were trained on: knowledge graphs, questions, and their file formats."""

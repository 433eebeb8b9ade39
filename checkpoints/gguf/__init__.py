"""Ordinary models in llama.cpp's file format, GGUF: config, weights and tokenizer in one file.

Start with `kinds.py`, which says how each architecture's fields and tensors are called in
transformers and what llama.cpp changed in them; `sizes.py` refuses
counts that do not fit together; `reader.py` opens a file by the package `gguf`.
"""

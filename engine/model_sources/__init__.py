"""Pretrained models and adapters: formats that are read and written."""

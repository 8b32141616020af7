"""Data sets: training pairs (``pairs``), their files (``photos``), the tile cutter (``tiles``), ``download``."""

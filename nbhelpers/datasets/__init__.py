"""Data sets: training pairs (``pairs``), the tile cutter (``tiles``) and hash-checked downloads (``download``)."""

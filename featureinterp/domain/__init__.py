"""The values that everything else passes around: frozen, without torch, without input or output."""

"""Optimisers whose moments are those of a projected gradient: GaLore and APOLLO."""

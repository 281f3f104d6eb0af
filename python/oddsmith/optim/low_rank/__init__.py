"""Optimisers with moments of a projected gradient: GaLore and APOLLO."""

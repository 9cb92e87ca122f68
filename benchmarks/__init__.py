"""Measurements and simulations: they write JSON and figures, and no package imports them."""

"""Clocks: what runs networks and layers, and how long they take here."""

"""Measuring dense and decomposed side by side: whole networks, single layers, any runtime."""

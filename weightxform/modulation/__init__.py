"""Style modulation and demodulation of a filter bank."""

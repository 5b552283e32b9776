"""A network as attacks see it: frozen, in one mode, its evaluations counted, and left as it was found."""

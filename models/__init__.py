"""The methods: networks, losses and hash codes, in pure PyTorch."""

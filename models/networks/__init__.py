"""Networks: hash layers, small networks, pretrained backbones, feature extractors, generators."""

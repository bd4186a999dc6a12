"""One short file a backbone: three class statements on the decoder of transformers."""

"""One short file a backbone: three class statements on the stock transformers decoder."""

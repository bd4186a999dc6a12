"""Images, sounds and other media: opened from files, URLs and bytes, and turned into the tensors of an encoder."""

"""Decoding under torch.compile: tables laid out for every length a static cache can reach."""

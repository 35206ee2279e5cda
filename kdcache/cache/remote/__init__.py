"""Remote caches: addresses, object stores, the Hugging Face Hub, the local mirror, signatures."""

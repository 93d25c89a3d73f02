"""The frozen backbone: loading, quantisation, fingerprint."""

"""What lies on disk: marks of layers, decoded from and encoded to bytes.

Pure: values in, values out, no system calls.  In each module decoding inverts encoding.
"""

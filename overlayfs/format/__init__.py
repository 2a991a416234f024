"""The on-disk format: one module per mark of a layer, which decodes it from bytes and encodes it to bytes.

Pure: values in, values out, no system calls.  In each module decoding inverts encoding.
"""

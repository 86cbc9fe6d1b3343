"""The API layer: bodies to requests, chunks to the data of answers. It knows no protocol; rest/ and
rpc/ encode what it returns.
"""

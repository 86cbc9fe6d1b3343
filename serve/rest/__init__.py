"""HTTP: reads requests, and encodes what api/ returns as JSON and server-sent events. FastAPI is
imported here only.
"""

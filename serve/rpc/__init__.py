"""gRPC: reads messages, and encodes what api/ returns as messages. grpc is imported here only."""

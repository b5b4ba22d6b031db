"""Generated code of proto/kvshrink/v1, made when the package is built: kvshrink_pb2, types_pb2, kvshrink_pb2_grpc."""

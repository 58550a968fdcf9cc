"""Cancels requests at many points of their way, until some have met a running statement."""

import sys
import time

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
method = pool.FindServiceByName("users.v1.UserService").methods_by_name["CheckUsername"]
request = message_factory.GetMessageClass(method.input_type)(username="zqzqalice")
response = message_factory.GetMessageClass(method.output_type)
check = channel.unary_unary(
    "/users.v1.UserService/CheckUsername",
    request_serializer=lambda message: message.SerializeToString(),
    response_deserializer=response.FromString,
)
check(request)

cancelled = 0
for attempt in range(2000):
    call = check.future(request)
    time.sleep((attempt % 40) * 0.0001)
    cancelled += call.cancel() and call.cancelled()
assert cancelled > 100, cancelled

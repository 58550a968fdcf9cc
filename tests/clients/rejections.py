"""What Python's grpcio reads of rejections. Usage: rejections.py HOST:PORT DESCRIPTORS < CASES

DESCRIPTORS is a file with a FileDescriptorSet. CASES is a JSON list of objects: `rpc` such as
"users.v1.UserService/GetUser", `request` (the message as JSON), `code` such as
"INVALID_ARGUMENT", `reason`, and `message`, which the status message must contain."""

import json
import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2
from grpc_status import rpc_status

address, descriptors = sys.argv[1:]
channel = grpc.insecure_channel(address)
pool = descriptor_pool.DescriptorPool()
with open(descriptors, "rb") as file:
    for proto in descriptor_pb2.FileDescriptorSet.FromString(file.read()).file:
        pool.Add(proto)


def status_of(rpc, request):
    """Sends one request and returns the status of the call."""
    service, name = rpc.split("/")
    method = pool.FindServiceByName(service).FindMethodByName(name)
    request = json_format.ParseDict(request, message_factory.GetMessageClass(method.input_type)())
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    call = kinds[method.client_streaming, method.server_streaming](
        f"/{rpc}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    argument = iter([request]) if method.client_streaming else request
    try:
        response = call(argument, timeout=20)
        if method.server_streaming:
            for _ in response:
                pass
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"{rpc} was not rejected")


for case in json.load(sys.stdin):
    error = status_of(case["rpc"], case["request"])
    assert error.code().name == case["code"], (case, error)
    assert case["message"] in error.details(), (case, error)
    infos = []
    for packed in rpc_status.from_call(error).details:
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info):
            infos.append((info.reason, info.domain))
    assert infos == [(case["reason"], "user-service.users.v1")], (case, error)
    has_pushback = "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
    assert has_pushback == (case["code"] == "UNAVAILABLE"), (case, error)

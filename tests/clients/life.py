"""Calls the service with Python's grpcio, which knows it by reflection only:
creates, changes, lists, watches and erases users. Usage: life.py HOST:PORT"""

import sys
import uuid

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

SERVICE = "users.v1.UserService"

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
pool = descriptor_pool.DescriptorPool(database)
service = pool.FindServiceByName(SERVICE)


def call(rpc, timeout_s=10, **fields):
    """Calls an rpc with the fields of its request."""
    method = service.FindMethodByName(rpc)
    request = message_factory.GetMessageClass(method.input_type)(**fields)
    stub = channel.unary_unary(
        f"/{SERVICE}/{rpc}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    return stub(request, timeout=timeout_s)


def rejected(code, reason, rpc, **fields):
    """Calls an rpc that must fail, and returns the details of the error."""
    try:
        response = call(rpc, **fields)
    except grpc.RpcError as error:
        assert error.code() == code, error
        details = {}
        for packed in rpc_status.from_call(error).details:
            name = packed.TypeName().removeprefix("google.rpc.")
            details[name] = getattr(error_details_pb2, name)()
            assert packed.Unpack(details[name])
        assert details["ErrorInfo"].reason == reason, details
        assert details["ErrorInfo"].domain == "user-service.users.v1"
        return details
    raise AssertionError(f"{rpc} was not rejected: {response}")


assert SERVICE in database.get_services()
assert "google.rpc" in pool.FindMessageTypeByName("google.rpc.BadRequest").full_name

# A retried create returns the same user.
request_id = str(uuid.uuid4())
alice = dict(username="zqzqAlice", email="zqzqalice@example.com", display_name="Alice")
user = call("CreateUser", user=alice, request_id=request_id).user
assert user.revision == 1 and user.create_time.seconds > 0
assert call("CreateUser", user=alice, request_id=request_id).user == user

# Invalid input is rejected with all violations.
details = rejected(grpc.StatusCode.INVALID_ARGUMENT, "USERNAME_INVALID", "CreateUser", user=dict(username="x", email="x"))
violations = [(v.field, v.reason) for v in details["BadRequest"].field_violations]
assert violations == [("user.username", "USERNAME_INVALID"), ("user.email", "EMAIL_INVALID")], violations
rejected(grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN", "CreateUser", user=dict(alice, username="ZQZQALICE"))

# A user of a known revision is not sent again.
assert call("GetUser", username="zqzqALICE").user == user
assert call("GetUser", id=user.id, if_revision_not=1).not_modified
assert not call("CheckUsername", username="zqzqalice").available

# An update of an old revision is rejected.
user = call("UpdateUser", user=dict(id=user.id, display_name="A.", revision=1), update_mask=dict(paths=["display_name"])).user
assert (user.revision, user.display_name) == (2, "A.")
details = rejected(grpc.StatusCode.FAILED_PRECONDITION, "REVISION_MISMATCH", "UpdateUser", user=dict(id=user.id, display_name="B.", revision=1))
assert details["ErrorInfo"].metadata["current_revision"] == "2"

# A list has pages.
for name in ("zqzqbob", "zqzqeve"):
    call("CreateUser", user=dict(username=name, email=f"{name}@example.com"))
page = call("ListUsers", page_size=2, order_by="ORDER_BY_USERNAME_ASC")
rest = call("ListUsers", page_size=2, order_by="ORDER_BY_USERNAME_ASC", page_token=page.next_page_token)
assert [u.username for u in [*page.users, *rest.users]] == ["zqzqAlice", "zqzqbob", "zqzqeve"]
rejected(grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID", "ListUsers", page_token=page.next_page_token)

# The rejection of a thousand items fits into the headers that this client accepts.
found = call("LookupUsers", keys=[dict(email="zqzqBOB@example.com"), dict(id=user.id), dict(username="nobody")])
assert [[u.username for u in result.users] for result in found.results] == [["zqzqbob"], ["zqzqAlice"], []]
many = [dict(user=dict(username=f"zqzqmany{n}", email="zqzqmany@example.com")) for n in range(1000)]
assert len(call("BatchCreateUsers", items=many).users) == 1000
details = rejected(grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN", "BatchCreateUsers", items=many)
assert details["ErrorInfo"].metadata["items"] == "0-999"
assert details["BadRequest"].field_violations[17].field == "items[17].user.username"
# The largest rejection: every second item, so that no two indexes form a range.
free = [item if n % 2 else dict(user=dict(item["user"], username=f"zqzqfree{n}")) for n, item in enumerate(many)]
details = rejected(grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN", "BatchCreateUsers", items=free)
assert details["ErrorInfo"].metadata["items"].split(",") == [str(n) for n in range(1, 1000, 2)]

# An address of several users does not name one. A repeated key is rejected.
assert call("GetUser", email="ZQZQalice@example.com").user.id == user.id
rejected(grpc.StatusCode.FAILED_PRECONDITION, "EMAIL_AMBIGUOUS", "GetUser", email="zqzqmany@example.com")
details = rejected(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "LookupUsers", keys=[dict(username="zqzqbob"), dict(username="ZQZQBOB")])
assert details["ErrorInfo"].metadata["keys"] == "0-1"

# A replaced username is held until its release.
bob = call("GetUser", username="zqzqbob").user
call("UpdateUser", user=dict(id=bob.id, username="zqzqrobert"))
rejected(grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN", "CreateUser", user=dict(username="zqzqbob", email="zqzq@example.com"))
assert call("CheckUsername", username="zqzqbob").available_time.seconds > 0
call("UpdateUser", user=dict(id=bob.id, username="zqzqrobert"), release_username=True)
assert call("CheckUsername", username="zqzqbob").available

# A watch sends the initial state.
watch = service.FindMethodByName("WatchUsers")
messages = channel.unary_stream(
    f"/{SERVICE}/WatchUsers",
    request_serializer=lambda message: message.SerializeToString(),
    response_deserializer=message_factory.GetMessageClass(watch.output_type).FromString,
)(message_factory.GetMessageClass(watch.input_type)(send_initial_state=True), timeout=60)
names = set()
for message in messages:
    names.update(change.user.username for change in message.changes if change.WhichOneof("state") == "user")
    if message.initial_state_end:
        break
messages.cancel()
assert {"zqzqAlice", "zqzqrobert", "zqzqeve"} <= names and len(names) == 1003

# A user is deleted, undeleted and erased.
assert call("DeleteUser", id=user.id).user.HasField("delete_time")
rejected(grpc.StatusCode.FAILED_PRECONDITION, "USER_DELETED", "DeleteUser", id=user.id)
assert call("UndeleteUser", id=user.id).user.revision == 4
rejected(grpc.StatusCode.FAILED_PRECONDITION, "USER_NOT_DELETED", "ExpungeUser", id=user.id)
assert call("ExpungeUser", id=user.id, force=True).user_id == user.id
details = rejected(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "GetUser", id=user.id)
assert details["ResourceInfo"].resource_name == user.id

print("ok")

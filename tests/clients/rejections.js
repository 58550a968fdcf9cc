// What @grpc/grpc-js reads of rejections. Usage and cases: see rejections.py.

"use strict";

const assert = require("node:assert");
const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const { root } = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; }
`);
const Status = root.lookupType("Status");
const ErrorInfo = root.lookupType("ErrorInfo");

const [address, descriptors] = process.argv.slice(2);
const services = loader.loadFileDescriptorSetFromBuffer(fs.readFileSync(descriptors));
const client = new grpc.Client(address, grpc.credentials.createInsecure());

/** Sends one request and returns the error of the call. */
function errorOf(rpc, request) {
  const [service, name] = rpc.split("/");
  const method = services[service][name];
  return new Promise((resolve, reject) => {
    const done = (error) => (error ? resolve(error) : reject(new Error(`${rpc} was not rejected`)));
    const kind = (method.requestStream ? "ClientStream" : "Unary") + (method.responseStream ? "Stream" : "");
    const make = {
      Unary: client.makeUnaryRequest,
      UnaryStream: client.makeServerStreamRequest,
      ClientStream: client.makeClientStreamRequest,
      ClientStreamStream: client.makeBidiStreamRequest,
    }[kind];
    const codec = [method.path, method.requestSerialize, method.responseDeserialize];
    const options = [new grpc.Metadata(), { deadline: Date.now() + 20000 }];
    const call = make.call(
      client,
      ...codec,
      ...(method.requestStream ? [] : [request]),
      ...options,
      ...(method.responseStream ? [] : [done])
    );
    if (method.responseStream) {
      call.on("data", () => {}).on("error", done).on("end", () => {});
    }
    if (method.requestStream) {
      call.write(request);
      call.end();
    }
  });
}

async function main() {
  for (const expected of JSON.parse(fs.readFileSync(0, "utf8"))) {
    const error = await errorOf(expected.rpc, expected.request);
    assert.strictEqual(grpc.status[error.code], expected.code, `${JSON.stringify(expected)}: ${error}`);
    assert.ok(error.details.includes(expected.message), `${JSON.stringify(expected)}: ${error}`);
    const [status] = error.metadata.get("grpc-status-details-bin");
    assert.ok(status, `${JSON.stringify(expected)}: no details`);
    const infos = Status.decode(status)
      .details.filter((any) => any.typeUrl.endsWith("/google.rpc.ErrorInfo"))
      .map((any) => ErrorInfo.decode(any.value));
    assert.deepStrictEqual(
      infos.map((info) => [info.reason, info.domain]),
      [[expected.reason, "user-service.users.v1"]]
    );
  }
  client.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});

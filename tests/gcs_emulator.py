"""A bucket on this machine: the HTTP interface of Cloud Storage by gcp-storage-emulator.

What it lacks is added: writing under the condition of a generation, 0 where there is no object yet,
and the generation of what is read.
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "bucket"


@contextlib.contextmanager
def emulator(log: Path) -> Iterator[dict[str, str]]:
    """Runs it in a process of its own; gives the environment that leads gcsfs and others there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, __file__, str(port)], stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        # Orbax writes arrays by tensorstore, and deletes by google-cloud-storage.
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        process.kill()
        process.wait()


def serve(port: int) -> None:
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(storage, name: str) -> str:
        try:
            return str(storage.get_file_obj(BUCKET, name)["generation"])
        except NotFound:
            return "0"

    def insert(request, response, storage, *arguments, **options):
        if asked := request.query.get("ifGenerationMatch"):
            # the name stands in the query, or in the first part of what is sent
            name = request.query.get("name", [None])[0] or request.data["meta"]["name"]
            if asked[0] != generation(storage, name):
                response.status = server.HTTPStatus.PRECONDITION_FAILED
                return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        return objects.insert(request, response, storage, *arguments, **options)

    def get(request, response, storage, *arguments, **options):
        response["x-goog-generation"] = generation(storage, request.params["object_id"])
        return objects.get(request, response, storage, *arguments, **options)

    ours = {objects.insert: insert, objects.get: get}
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = ours.get(handler, handler)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))

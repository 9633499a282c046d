#!/usr/bin/env python3
"""Baseline of `cloze-worker bench-checkpoint s3://…`: puts the same two objects into a bucket by plain multipart uploads, without a hash
and without a manifest, one part after another and by boto3's own transfer with four threads. One JSON line for each.

multipart_put.py BUCKET --params 100000000      (endpoint and keys from AWS_*; needs boto3)
"""
import argparse
import io
import json
import os
import time

import boto3
from boto3.s3.transfer import TransferConfig

PART_BYTES = 16 << 20


def put_in_turn(client, bucket, key, content):
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    parts = []
    for start in range(0, len(content), PART_BYTES):
        number = len(parts) + 1
        body = content[start : start + PART_BYTES]
        answer = client.upload_part(Bucket=bucket, Key=key, PartNumber=number, UploadId=upload, Body=body)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})


def put_by_transfer(client, bucket, key, content):
    config = TransferConfig(multipart_chunksize=PART_BYTES, max_concurrency=4)
    client.upload_fileobj(io.BytesIO(content), bucket, key, Config=config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bucket")
    parser.add_argument("--params", type=int, default=100_000_000)
    arguments = parser.parse_args()
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT"])
    contents = {"model": os.urandom(4 * arguments.params), "optimizer": os.urandom(8 * arguments.params)}
    gb = sum(map(len, contents.values())) / 1e9
    for tool, put in (("multipart put", put_in_turn), ("boto3 transfer", put_by_transfer)):
        started = time.perf_counter()
        for key, content in contents.items():
            put(client, arguments.bucket, f"plain/{key}", content)
        saved_s = time.perf_counter() - started
        print(json.dumps({"tool": tool, "gb": round(gb, 2), "saved_s": round(saved_s, 3), "save_gb_s": round(gb / saved_s, 3)}), flush=True)
        for key in contents:
            client.delete_object(Bucket=arguments.bucket, Key=f"plain/{key}")


if __name__ == "__main__":
    main()

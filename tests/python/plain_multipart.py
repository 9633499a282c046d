#!/usr/bin/env python3
"""Throughput of a plain multipart put: one object of random bytes to an S3 endpoint by boto3, in parts of 16 MiB, four at a time.

    AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… plain_multipart.py ENDPOINT BUCKET KEY --mib 600 --repeat 3
"""
import argparse
import io
import json
import os
import time

import boto3
from boto3.s3.transfer import TransferConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("endpoint")
parser.add_argument("bucket")
parser.add_argument("key")
parser.add_argument("--mib", type=int, default=600)
parser.add_argument("--repeat", type=int, default=3)
arguments = parser.parse_args()

client = boto3.client("s3", endpoint_url=arguments.endpoint, region_name="us-east-1")
config = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=16 << 20, max_concurrency=4)
content = os.urandom(1 << 20) * arguments.mib
for _ in range(arguments.repeat):
    started = time.perf_counter()
    client.upload_fileobj(io.BytesIO(content), arguments.bucket, arguments.key, Config=config)
    seconds = time.perf_counter() - started
    client.delete_object(Bucket=arguments.bucket, Key=arguments.key)
    print(json.dumps(dict(tool="boto3", gb=len(content) / 1e9, seconds=round(seconds, 3), gb_s=round(len(content) / 1e9 / seconds, 3))), flush=True)

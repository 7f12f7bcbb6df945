"""Checks a bucket before work starts: credentials, endpoint, existence, region, write permission."""

import os
import uuid
from typing import Any

SCHEME = "s3://"
RETRIES = {"mode": "standard", "total_max_attempts": 4}


def check(uri: str, write: bool = False) -> None:
    """Check that a location in a bucket can be listed and, if requested, written.

    Args:
        uri: ``s3://bucket/prefix``.
        write: write and delete a small object.

    Raises:
        ValueError: it cannot; says what is missing.
    """
    import boto3  # noqa: PLC0415  only buckets need it
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, NoCredentialsError, PartialCredentialsError  # noqa: PLC0415

    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    try:
        client = boto3.session.Session().client("s3", config=Config(retries=RETRIES, connect_timeout=10, read_timeout=30))
        client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        if write:
            key = "/".join(filter(None, (prefix.rstrip("/"), f".hashbridge-check-{uuid.uuid4().hex[:8]}")))
            client.put_object(Bucket=bucket, Key=key, Body=b"")
            client.delete_object(Bucket=bucket, Key=key)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ValueError(f"{uri}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role") from error
    except EndpointConnectionError as error:
        raise ValueError(f"{uri}: {_endpoint()} does not answer: check AWS_ENDPOINT_URL and AWS_REGION") from error
    except ClientError as error:
        raise ValueError(f"{uri}: {_said(error.response, bucket, error.operation_name)}") from error
    except BotoCoreError as error:
        raise ValueError(f"{uri}: {' '.join(str(error).split())}") from error


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "S3"


def _said(response: dict[str, Any], bucket: str, operation: str) -> str:
    """Explain a bucket's refusal in one line."""
    told, headers = response.get("Error", {}), response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    code, status = str(told.get("Code")), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    permission = {"ListObjectsV2": "s3:ListBucket", "PutObject": "s3:PutObject", "DeleteObject": "s3:DeleteObject"}[operation]
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r} at {_endpoint()}: make it first"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        return f"the credentials are refused ({code}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException") or status == 301:
        region = headers.get("x-amz-bucket-region") or told.get("Region")
        return f"the bucket is in another region: set AWS_REGION={region or 'to its own'}"
    if status == 403:
        return f"the credentials lack the permission {permission} ({code})"
    return f"{operation} fails ({code}: {' '.join(str(told.get('Message')).split())[:200]})"

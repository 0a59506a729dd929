"""The dashboard behind nginx: under a path, with TLS, and with the names of the proxy's users."""

from __future__ import annotations

import base64
import http.client
import os
import re
import shutil
import ssl
import subprocess
from html import unescape
from urllib.parse import urlencode

import pytest
from conftest import PATIENCE_SECONDS, ROOT, free_port, wait_until

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
CONFIGURATION = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/certificate.pem; ssl_certificate_key {folder}/key.pem;
    {location}
  }}
}}
"""
LOCATION = """location /queue/ {{
      proxy_pass {upstream}{path};
      proxy_set_header X-Remote-User $arg_user;
      proxy_set_header Host {host};
    }}"""


class Proxy:
    def __init__(self, place, port, location):
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=queue.example.org"]
        files = ["-keyout", str(place.folder / "key.pem"), "-out", str(place.folder / "certificate.pem")]
        subprocess.run([*make, *files], check=True, capture_output=True)
        place.write("nginx.conf", CONFIGURATION.format(folder=place.folder, port=port, location=location))
        place.start_command([NGINX, "-p", str(place.folder), "-c", str(place.folder / "nginx.conf")])
        self.port, self.host = port, "queue.example.org"
        wait_until(lambda: self.answers("/queue/livez"))

    def answers(self, path):
        try:
            return self.ask(path)[0] in (200, 401)
        except OSError:
            return False

    def ask(self, path, form=None, **headers):
        """Return the status, the text and the headers of the answer."""
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS, context=trusting)
        try:
            body = None if form is None else urlencode(form)
            given = {"Host": self.host, "Origin": f"https://{self.host}", **headers}
            connection.request("GET" if form is None else "POST", path, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()


@pytest.mark.parametrize("removes_prefix", [True, False], ids=["removing the path", "passing on the path"])
def test_operator_acts_behind_a_proxy_that_names_him(place, removes_prefix):
    queue = place.queue()
    job_id = queue.enqueue("work")
    queue.mark_failed(job_id)
    settings = {"PQUEUE_OPS_PREFIX": "/queue", "PQUEUE_OPS_HOSTS": "queue.example.org, pqueue"}
    address = place.dashboard(**settings, PQUEUE_OPS_USER_HEADER="X-Remote-User")
    upstream = address.removesuffix("/queue")
    path = "/" if removes_prefix else ""
    host = "pqueue" if removes_prefix else "$host"
    proxy = Proxy(place, free_port(), LOCATION.format(upstream=upstream, path=path, host=host))
    status, page, _ = proxy.ask(f"/queue/job/{job_id}")
    assert status == 200
    links = {unescape(each) for each in re.findall(r'(?:href|src|action)="([^"#]+)', page)}
    assert all(each.startswith("/queue/") for each in links)
    for link in links:
        assert proxy.ask(link)[0] == (404 if "/act/" in link else 200), link
    token = re.search(r'name="token" value="([^"]+)"', page)[1]
    form = {"token": token, "id": job_id, "back": f"/job/{job_id}"}
    assert proxy.ask("/queue/act/resubmit", form, Origin="https://evil.example")[0] == 403
    status, _, headers = proxy.ask("/queue/act/resubmit?user=ann", form)
    assert (status, queue.get(job_id).state) == (303, "pending")
    assert headers["Location"].startswith(f"/queue/job/{job_id}?said=")
    assert "resubmitted 1 job" in proxy.ask(headers["Location"])[1]
    assert queue.operations()[0]["actor"] == "ann (dashboard)"
    assert "ann (dashboard)" in proxy.ask("/queue/activity")[1]
    assert proxy.ask("/queue/metrics")[0] == 200


def test_operator_acts_through_the_nginx_of_the_docs(place):
    queue = place.queue()
    job_id = queue.enqueue("work")
    document = (ROOT / "docs/deployment.md").read_text()
    location = re.search(r"```nginx [^\n]+\n(.*?)```", document, re.DOTALL)[1]
    (variables,) = re.findall(r"^export (PQUEUE_OPS_HOSTS.*)$", document, re.MULTILINE)
    upstream = place.dashboard(**dict(each.split("=") for each in variables.split())).removesuffix("/queue")
    passwords = place.write("queue.htpasswd", "ann:{PLAIN}secret\n")
    replaced = {"http://127.0.0.1:8501": upstream, "/etc/nginx/queue.htpasswd": str(passwords)}
    for old, new in replaced.items():
        assert old in location
        location = location.replace(old, new)
    proxy = Proxy(place, free_port(), location)
    assert proxy.ask("/queue/")[0] == 401
    ann = {"Authorization": f"Basic {base64.b64encode(b'ann:secret').decode()}"}
    status, page, _ = proxy.ask(f"/queue/job/{job_id}", **ann)
    assert status == 200
    token = re.search(r'name="token" value="([^"]+)"', page)[1]
    assert proxy.ask("/queue/act/cancel", {"token": token, "id": job_id, "back": "/"}, **ann)[0] == 303
    assert [(each["event"], each["actor"]) for each in queue.operations()] == [("cancelled", "ann (dashboard)")]

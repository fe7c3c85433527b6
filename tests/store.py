"An S3 server of one's own, moto's, which counts the bytes that pass; prints its port"
import logging

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

COUNTED = '/passed'       # answers with the bytes sent so far
FORBIDDEN = '/forbidden'  # a bucket that nobody may look into


class Counting:
    "Any WSGI application, and how many bytes it answered with"
    def __init__(self, app):
        self.app = app
        self.sent = 0

    def counted(self, answer):
        for part in answer:
            self.sent += len(part)
            yield part

    def __call__(self, environ, start):
        path = environ['PATH_INFO']
        if path == COUNTED:
            start('200 OK', [])
            return [str(self.sent).encode()]
        if path.startswith(FORBIDDEN):
            start('403 Forbidden', [('Content-Length', '0')])
            return []
        return self.counted(self.app(environ, start))


def main():
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    app = Counting(DomainDispatcherApplication(create_backend_app))
    server = make_server('127.0.0.1', 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == '__main__':
    main()

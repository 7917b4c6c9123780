/* A client of the test's server: /path/of/client ADDRESS PORT COUNT children|threads
 *
 * Opens COUNT connections at once, each in a thread or in a program of its own. Each reads what the server sends up to
 * the end of the stream. Exit code: how many bytes came in all. */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static struct sockaddr_in server = {.sin_family = AF_INET};
static pthread_barrier_t together;

static void *connection(void *arg)
{
    int at_once = arg != NULL, bytes = 0;
    char byte;

    if (at_once)
        pthread_barrier_wait(&together);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&server, sizeof server) < 0) {
        perror("connect");
        exit(255);
    }
    while (read(fd, &byte, 1) == 1)
        bytes++;
    close(fd);
    return (void *)(long)bytes;
}

int main(int argc, char **argv)
{
    int count = atoi(argv[3]), bytes = 0;

    inet_pton(AF_INET, argv[1], &server.sin_addr);
    server.sin_port = htons(atoi(argv[2]));
    if (count == 1)
        return (long)connection(NULL);
    if (!strcmp(argv[4], "threads")) {
        pthread_t thread[count];
        pthread_barrier_init(&together, NULL, count);
        for (int i = 0; i < count; i++)
            pthread_create(&thread[i], NULL, connection, &together);
        for (int i = 0; i < count; i++) {
            void *result;
            pthread_join(thread[i], &result);
            bytes += (long)result;
        }
    } else {
        for (int i = 0; i < count; i++)
            if (fork() == 0) {
                execl(argv[0], argv[0], argv[1], argv[2], "1", argv[4], NULL);
                _exit(255);
            }
        /* As a shell's `wait`: there must be no child that is not ours. */
        for (int status, children = 0; wait(&status) > 0 || children != count; children++)
            bytes += WEXITSTATUS(status);
    }
    return bytes;
}

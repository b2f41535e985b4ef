#include <stdio.h>
#include <string.h>
#include <windows.h>
/* Runs Linux's cuobjdump. Wine gives no handle of a Linux process and no pipe to it: its output goes through a file. */
int main(int count, char **words) {
    static char line[16384], place[MAX_PATH], out[MAX_PATH], done[MAX_PATH], unixes[MAX_PATH];
    GetTempPathA(sizeof place, place);
    sprintf(out, "%scuobjdump-%lu", place, GetCurrentProcessId());
    sprintf(done, "%s.done", out);
    strcpy(line, "Z:\\bin\\sh -c \"/c/drive_c/python/cuobjdump");
    for (int i = 1; i <= count; i++) {
        const char *word = i < count ? words[i] : out;
        strcat(line, i < count ? " " : " > ");
        if (word[0] && word[1] == ':') { strcat(line, "/c/drive_c"); word += 2; }
        char *end = line + strlen(line);
        strcpy(unixes, word);
        for (char *c = unixes; *c; c++) if (*c == '\\') *c = '/';
        strcpy(end, unixes);
    }
    sprintf(line + strlen(line), " 2>&1; mv /c/drive_c%s /c/drive_c%s.done\"", unixes, unixes);
    STARTUPINFOA start = {sizeof start};
    PROCESS_INFORMATION made;
    if (!CreateProcessA(NULL, line, NULL, NULL, FALSE, 0, NULL, NULL, &start, &made)) return 1;
    FILE *file = NULL;
    for (int i = 0; i < 6000 && !(file = fopen(done, "rb")); i++) Sleep(10);
    if (!file) return 1;
    for (int c; (c = fgetc(file)) != EOF;) putchar(c);
    fclose(file);
    return !DeleteFileA(done);
}
